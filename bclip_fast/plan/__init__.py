"""The estimate of a run's memory, operations and time before it starts (`bclip plan`)."""
