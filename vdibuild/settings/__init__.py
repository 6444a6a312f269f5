"""What a site file says, as typed models: every setting has one home, a default and a sentence.

site.py reads the file.
"""
