"""What people look at: pictures, loggers, the report."""
