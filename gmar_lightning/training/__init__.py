"""What `train.py` trains; replaceable by your own LightningModule and data."""
