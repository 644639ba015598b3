"""What people read: the leaderboard and the table of one run. Reads records only, and never imports torch."""
