"""What people see of a report: the JSON that pages draw, and a report page that needs no other file.

The page's own files lie in ``static``: styles, the script that draws reports, and every English text in
``strings.json``. All texts of images and models are put into the page as text, never as HTML.
"""
