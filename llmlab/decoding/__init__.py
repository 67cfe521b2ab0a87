"""Seam E: how tokens are proposed, sampled, verified and committed. Importing the package loads no torch."""
