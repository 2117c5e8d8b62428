"""Programs that use ondevice_trgl as an app would. Run them from the top of the repository."""
