from plugins_builtin.guards.rmt.guard import RMTGuard as RMTGuard
