"""The adapters and guards that ship, as plugins like any other. None imports torch before it is used."""
