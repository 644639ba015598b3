"""The parts of the course report's experiment: its model, its backbone, its own counting, and what was found out."""
