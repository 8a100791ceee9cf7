"""The life of an engine on this device: brought, activated, proven, gone back from, removed."""
