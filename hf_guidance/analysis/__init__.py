"""What people look at: tables of matched runs, curves, similarities over time."""
