"""A plugin for effbench as a third party writes it."""
