"""What workstation and device share: package format, images, records. numpy, pillow and the standard library only."""
__version__ = "0.1.0"
