"""What the page of a report says, a section a module."""
