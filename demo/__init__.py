"""The local web page over any pipeline folder."""
