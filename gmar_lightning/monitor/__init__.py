"""What was seen over a run: the probe images, the schedule, the record, the collapse detector."""
