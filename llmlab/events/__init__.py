"""The one truth: every decision and change of state as a frozen event; state is a fold of events."""
