"""Tables, column types, views, and the life of a schema: created, checked, upgraded."""
