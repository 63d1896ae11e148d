// Package blobstoretest holds what tests of storage need: Run, the conformance suite that every
// blobstore backend passes; Memory, a backend in memory that passes it too and is fast enough for model
// tests; and Faulty, a decorator that fails calls before or after their effect by a script.
package blobstoretest
