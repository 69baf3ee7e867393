from plugins_builtin.guards.serving.guard import ServingGuard as ServingGuard
