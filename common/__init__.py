"""What every part may use and that uses none of them: files."""
