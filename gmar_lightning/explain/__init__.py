"""The engine: heatmaps and head importance of a batch, torch only."""
