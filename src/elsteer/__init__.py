"""elsteer"""
