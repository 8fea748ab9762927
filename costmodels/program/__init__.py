"""The program that is costed and searched: values, operations over factors, regions."""
