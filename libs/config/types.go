package config

import (
	"fmt"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
)

// maxSecretFile bounds a file that holds a secret, in bytes.
const maxSecretFile = 64 << 10

// Secret is a text that is never printed. In a file or a variable it is given as
// it is, or as "file:PATH" to be read from a file, without the line ends at its
// end. It cannot be given by a flag, which everybody on the machine could see.
type Secret struct{ text, file string }

// Again reads the secret once more from the file that it came from; false when it came from none. Something may renew what is
// in there while the program runs.
func (s Secret) Again() (Secret, bool, error) {
	if s.file == "" {
		return s, false, nil
	}
	next := Secret{file: s.file}
	err := next.read()
	return next, true, err
}

// NewSecret returns a secret, for defaults in tests.
func NewSecret(text string) Secret { return Secret{text: text} }

// Reveal returns the text.
func (s Secret) Reveal() string { return s.text }

// IsSet tells whether there is one.
func (s Secret) IsSet() bool { return s.text != "" }

// String returns "***", or "" if there is none.
func (s Secret) String() string {
	if s.text == "" {
		return ""
	}
	return "***"
}

// Format prints the same for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue is what slog prints.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText returns what String does: secrets do not survive being written.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText takes the text, or reads it from the file that it names.
func (s *Secret) UnmarshalText(text []byte) error {
	path, inFile := strings.CutPrefix(string(text), "file:")
	if !inFile {
		*s = Secret{text: string(text)}
		return nil
	}
	s.file = path
	return s.read()
}

func (s *Secret) read() error {
	path := s.file
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("read secret: %w", err)
	}
	if info.Size() > maxSecretFile {
		return fmt.Errorf("read secret: %s is larger than %d bytes", path, maxSecretFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read secret: %w", err)
	}
	s.text = strings.TrimRight(string(data), "\r\n")
	return nil
}

// ByteSize is a number of bytes, written with a unit: 512, 64KiB, 1.5GiB, 10MB.
type ByteSize int64

// Units of a ByteSize.
const (
	KiB ByteSize = 1 << (10 * (iota + 1))
	MiB
	GiB
	TiB
)

var byteUnits = []struct {
	name string
	size ByteSize
}{
	{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

// ParseByteSize reads a size of 0 bytes or more.
func ParseByteSize(text string) (ByteSize, error) {
	number, unit := strings.TrimSpace(text), ByteSize(1)
	for _, u := range byteUnits {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = strings.TrimSpace(rest), u.size
			break
		}
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil && n >= 0 && n <= math.MaxInt64/int64(unit) {
		return ByteSize(n) * unit, nil
	}
	x, err := strconv.ParseFloat(number, 64)
	size := x * float64(unit)
	if err != nil || !(size >= 0) || size >= math.MaxInt64 || size != math.Trunc(size) {
		return 0, fmt.Errorf("%q is no size: want a whole number of bytes with a unit, as in 64MiB", text)
	}
	return ByteSize(size), nil
}

// String returns the size in the largest binary unit that divides it.
func (b ByteSize) String() string {
	for _, u := range byteUnits[:4] {
		if b != 0 && b%u.size == 0 {
			return strconv.FormatInt(int64(b/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10) + "B"
}

// MarshalText returns String.
func (b ByteSize) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText is [ParseByteSize].
func (b *ByteSize) UnmarshalText(text []byte) error {
	size, err := ParseByteSize(string(text))
	if err == nil {
		*b = size
	}
	return err
}
