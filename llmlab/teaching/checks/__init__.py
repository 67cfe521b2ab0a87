"""The hidden checks of the lessons' exercises, by subject."""
