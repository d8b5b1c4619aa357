"""Networks that come with lance-host, one family a file."""
