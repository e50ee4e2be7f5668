"""What several test modules share: tiny networks, references, planted series, readers of records."""
