// Package segment reads and writes segments: self-contained objects that carry
// changes of one disk, from hosts to storage.
//
// A segment says whose changes it holds (Header), lists sorted extents that
// do not overlap, each either data or zeros, and carries the data in frames of
// at most 64 KiB, each compressed on its own where that pays and protected
// by a CRC32C. The index is at the tail, so a writer needs one pass and a
// reader one ranged get. docs/formats/segment.md is the format.
//
//	w, err := segment.NewWriter(header, buf, segment.Options{})
//	for each extent in ascending order {
//		err = w.Data(off, p)  // or w.Zero(off, length)
//		if w.Full() { put w.Finish(); w, err = segment.NewWriter(header, buf, ...) }
//	}
//
// Writer finds zero blocks inside data by itself. Reader keeps the index in
// memory, at most a few MiB, and reads data by ranges.
package segment
