"""Workloads: who asks what, and when. No torch."""
