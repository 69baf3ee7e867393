from plugins_builtin.guards.spectral.guard import SpectralGuard as SpectralGuard
