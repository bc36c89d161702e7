"""The schema: tables, column types and views; how it is created, checked and upgraded."""
