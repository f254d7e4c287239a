"""Bad input gets one clear error: rules for arguments, checks of spaces, envs and what they return."""
