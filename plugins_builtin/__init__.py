"""The adapters, guards and providers that ship, as plugins like any other. None imports torch before it is used."""
