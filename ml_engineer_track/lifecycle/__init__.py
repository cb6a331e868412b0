"""What happens to a model after it was published: is it still right for what people ask, and what replaces it?"""
