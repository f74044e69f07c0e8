"""Pictures of what heads do on text: what each is called, and where one looks in the text itself."""
