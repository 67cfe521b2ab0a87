"""Executors: they run a StepPlan, really or on simulated timelines. The scheduler cannot tell which."""
