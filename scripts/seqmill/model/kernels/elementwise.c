/* The elementwise steps around the matrix products, each in one pass over memory. */
