"""Programs that measure, and the tables made from their records."""
