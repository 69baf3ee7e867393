"""The providers of text that ship: one module each, and what those that read files share."""
