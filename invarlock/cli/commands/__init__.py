"""The built-in commands: each module adds its parser through ``invarlock_add_commands``, as a plugin's would."""
