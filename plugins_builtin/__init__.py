"""The adapters, guards and providers of text that ship, as plugins like any other. None imports torch before it is used."""
