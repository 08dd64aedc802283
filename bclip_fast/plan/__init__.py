"""What a run needs: memory, time and disk, estimated before it starts (`bclip plan`)."""
