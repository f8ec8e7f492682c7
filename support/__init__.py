"""What every file needs: files, checkpoints, ranks, checks of flags, the registries."""
