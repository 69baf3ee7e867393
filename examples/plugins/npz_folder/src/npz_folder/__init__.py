"""npz_folder: an adapter for InvarLock, for a format of its own."""
