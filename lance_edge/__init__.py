"""What workstation and device share; imports numpy, pillow and the standard library only."""

__version__ = "0.1.0"
