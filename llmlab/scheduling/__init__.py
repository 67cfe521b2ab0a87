"""Scheduling: built-in policies for seams A-C, and the scheduler that calls them. No torch anywhere."""
