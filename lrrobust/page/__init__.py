"""The report as one page: everything in a single HTML file that needs neither network nor server."""

from lrrobust.page.build import PAGE_NAME, write_page

__all__ = ["PAGE_NAME", "write_page"]
