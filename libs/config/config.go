// Package config loads the configuration of a program in layers: defaults in
// code, a YAML file, environment variables, flags; the later wins. A key that
// does not exist is an error that names where it stands, and all problems are
// reported at once.
//
// A configuration is a struct whose fields have a tag koanf:"snake_case" and,
// for the help text, help:"...". Nested structs are sections:
//
//	type Config struct {
//		Uploader struct {
//			Workers int           `koanf:"workers" help:"segments built at once"`
//			Cap     config.ByteSize `koanf:"cap"`
//		} `koanf:"uploader"`
//	}
//
// uploader.workers is then the key in the file, --uploader.workers the flag and
// LANDFALL_UPLOADER__WORKERS the variable (two underscores part sections). Fields
// may be strings, numbers, booleans, durations, anything with UnmarshalText,
// and slices or maps of these.
//
// Variables with the prefix whose first part is no section or key of this
// program belong to another one and are ignored; inside a known section an
// unknown key is an error.
//
// # Validation
//
// Every struct in the tree whose pointer or value has Validate() error is asked.
// It reports with [Bad], keys relative to itself, joined by errors.Join, and does
// not ask its sections: [Load] does.
package config

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"
)

// Names of the flags that every program has.
const (
	FlagFile  = "config"
	FlagCheck = "config.check"
	FlagPrint = "print-config"
)

// EnvPrefix of environment variables.
const EnvPrefix = "LANDFALL_"

// maxFile bounds the configuration file in bytes.
const maxFile = 1 << 20

// ErrDone is returned when the program has done what was asked of it by
// --config.check, --print-config or --help, and should exit with success.
var ErrDone = errors.New("nothing more to do")

// Options configures [New] and [Load].
type Options struct {
	// Name of the program, for the help text.
	Name string
	// Args are the command line without the program's name.
	Args []string
	// Environ is the environment as os.Environ returns it; nil is none.
	Environ []string
	// File is read when no --config is given; a missing one is no error then.
	File string
	// Stdout receives what is asked for; default os.Stdout.
	Stdout io.Writer
}

// Problem is one thing wrong with a configuration.
type Problem struct {
	Key    string // path, "" for the whole
	What   string
	Source string // where the value was given, "" if not known
}

// Error returns the problem as one line.
func (p *Problem) Error() string {
	text := p.What
	if p.Key != "" {
		text = p.Key + ": " + text
	}
	if p.Source != "" {
		text += " (" + p.Source + ")"
	}
	return text
}

// Bad reports a problem of a key, relative to the struct that is validated.
func Bad(key, format string, args ...any) error {
	return &Problem{Key: key, What: fmt.Sprintf(format, args...)}
}

// Error is everything that is wrong, in the order of the fields.
type Error struct{ Problems []*Problem }

// Error returns a line for each problem.
func (e *Error) Error() string {
	lines := make([]string, 0, len(e.Problems)+1)
	lines = append(lines, "configuration:")
	for _, p := range e.Problems {
		lines = append(lines, "  "+p.Error())
	}
	return strings.Join(lines, "\n")
}

// Loader holds the flags of a configuration until they are parsed.
type Loader[T any] struct {
	o        Options
	defaults T
	fields   []field // leaves of defaults, in order
	flags    *pflag.FlagSet
}

// New prepares the flags of a configuration whose defaults are given. It panics
// if T has a field that cannot be configured (a programming error).
func New[T any](defaults T, o Options) *Loader[T] {
	if o.Stdout == nil {
		o.Stdout = os.Stdout
	}
	l := &Loader[T]{o: o, defaults: defaults, flags: pflag.NewFlagSet(o.Name, pflag.ContinueOnError)}
	l.flags.SortFlags = false
	l.fields = leaves(&l.defaults)
	l.flags.String(FlagFile, o.File, "YAML file of the configuration")
	l.flags.Bool(FlagCheck, false, "check the configuration and exit")
	l.flags.String(FlagPrint, "", "print the configuration as YAML and exit: full, or diff for what differs from the defaults")
	for _, f := range l.fields {
		if f.flag {
			l.flags.Var(&flagValue{text: f.text(), typ: f.typeName()}, f.key, f.help)
			if f.isBool() {
				l.flags.Lookup(f.key).NoOptDefVal = "true"
			}
		}
	}
	return l
}

// Load prepares, parses Options.Args and loads. Arguments that are not flags are
// an error.
func Load[T any](defaults T, o Options) (T, error) {
	l := New(defaults, o)
	l.flags.Usage = func() {}
	err := l.flags.Parse(o.Args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		_, _ = fmt.Fprintf(l.o.Stdout, "Usage: %s [flags]\n\n%s", o.Name, l.flags.FlagUsages())
		return defaults, ErrDone
	case err != nil:
		return defaults, &Error{Problems: []*Problem{{What: err.Error(), Source: "command line"}}}
	case l.flags.NArg() > 0:
		return defaults, &Error{Problems: []*Problem{{
			What: fmt.Sprintf("unexpected argument %q", l.flags.Arg(0)), Source: "command line",
		}}}
	}
	return l.Load()
}

// Flags returns the flag set, to be added to a command and parsed with it.
func (l *Loader[T]) Flags() *pflag.FlagSet { return l.flags }

// Load merges the layers once the flags are parsed. The error is an [*Error] with
// every problem, or [ErrDone].
func (l *Loader[T]) Load() (T, error) {
	// Defaults are copied so that slices and maps of the two never share memory:
	// decoding replaces them whole.
	out := l.defaults
	merged := map[string]any{} // by leaf
	sources := map[string]string{}
	var problems []*Problem
	for _, layer := range []func() (map[string]any, map[string]string, []*Problem){l.file, l.environ, l.commandLine} {
		values, from, bad := layer()
		problems = append(problems, bad...)
		maps.Copy(merged, values)
		maps.Copy(sources, from)
	}
	fields := leaves(&out)
	broken := map[string]bool{}
	for _, f := range fields {
		value, given := merged[f.key]
		if !given {
			continue
		}
		if err := f.set(value); err != nil {
			problems = append(problems, &Problem{Key: f.key, What: err.Error(), Source: sources[f.key]})
			broken[f.key] = true
		}
	}
	for _, p := range validate(&out) {
		if !broken[p.Key] {
			p.Source = sources[p.Key]
			problems = append(problems, p)
		}
	}
	if len(problems) > 0 {
		l.sort(problems)
		return out, &Error{Problems: problems}
	}
	return out, l.answer(fields)
}

// answer does what --config.check and --print-config ask for.
func (l *Loader[T]) answer(fields []field) error {
	kind, _ := l.flags.GetString(FlagPrint)
	check, _ := l.flags.GetBool(FlagCheck)
	switch kind {
	case "":
		if check {
			_, _ = fmt.Fprintln(l.o.Stdout, "configuration is valid")
			return ErrDone
		}
		return nil
	case "full", "diff":
		text, err := render(fields, l.fields, kind == "diff")
		if err != nil {
			return fmt.Errorf("print configuration: %w", err)
		}
		if _, err := l.o.Stdout.Write(text); err != nil {
			return fmt.Errorf("print configuration: %w", err)
		}
		return ErrDone
	}
	return &Error{Problems: []*Problem{{Key: FlagPrint, What: fmt.Sprintf("%q is neither full nor diff", kind), Source: "flag --" + FlagPrint}}}
}

func (l *Loader[T]) sort(problems []*Problem) {
	position := func(key string) int {
		return slices.IndexFunc(l.fields, func(f field) bool { return f.key == key || strings.HasPrefix(key, f.key+".") })
	}
	slices.SortStableFunc(problems, func(a, b *Problem) int { return position(a.Key) - position(b.Key) })
}

// file reads the YAML layer.
func (l *Loader[T]) file() (map[string]any, map[string]string, []*Problem) {
	name, _ := l.flags.GetString(FlagFile)
	if name == "" {
		return nil, nil, nil
	}
	source := "file " + name
	info, err := os.Stat(name)
	if errors.Is(err, os.ErrNotExist) && !l.flags.Changed(FlagFile) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, []*Problem{{What: err.Error(), Source: source}}
	}
	if info.Size() > maxFile {
		return nil, nil, []*Problem{{What: fmt.Sprintf("larger than %d bytes", maxFile), Source: source}}
	}
	k := koanf.New(".")
	if err := k.Load(file.Provider(name), yaml.Parser()); err != nil {
		return nil, nil, []*Problem{{What: err.Error(), Source: source}}
	}
	values, from := map[string]any{}, map[string]string{}
	var problems []*Problem
	seen := map[string]bool{}
	for _, key := range k.Keys() {
		if key == "" {
			continue
		}
		leaf := l.leaf(key)
		if leaf == "" {
			if v := k.Get(key); v == nil && l.section(key) {
				continue // a section that is there but empty
			}
			problems = append(problems, l.unknown(key, source))
			continue
		}
		if !seen[leaf] {
			seen[leaf] = true
			values[leaf], from[leaf] = k.Get(leaf), source
		}
	}
	return values, from, problems
}

// environ reads the layer of variables.
func (l *Loader[T]) environ() (map[string]any, map[string]string, []*Problem) {
	values, from := map[string]any{}, map[string]string{}
	var problems []*Problem
	for _, pair := range l.o.Environ {
		name, value, _ := strings.Cut(pair, "=")
		rest, ours := strings.CutPrefix(name, EnvPrefix)
		if !ours {
			continue
		}
		key := strings.ToLower(strings.ReplaceAll(rest, "__", "."))
		source := "environment " + name
		first, _, inSection := strings.Cut(key, ".")
		switch {
		case l.leaf(key) == key:
			values[key], from[key] = value, source
		case inSection && l.section(first):
			problems = append(problems, l.unknown(key, source))
		}
	}
	return values, from, problems
}

// commandLine reads the layer of flags.
func (l *Loader[T]) commandLine() (map[string]any, map[string]string, []*Problem) {
	values, from := map[string]any{}, map[string]string{}
	for _, f := range l.fields {
		if flag := l.flags.Lookup(f.key); flag != nil && f.flag && flag.Changed {
			values[f.key], from[f.key] = flag.Value.String(), "flag --"+f.key
		}
	}
	return values, from, nil
}

// leaf returns the configured key that key is or lies in (a map's entry), or "".
func (l *Loader[T]) leaf(key string) string {
	for _, f := range l.fields {
		if f.key == key || f.isMap() && strings.HasPrefix(key, f.key+".") {
			return f.key
		}
	}
	return ""
}

func (l *Loader[T]) section(key string) bool {
	return slices.ContainsFunc(l.fields, func(f field) bool { return strings.HasPrefix(f.key, key+".") })
}

// unknown names a key that does not exist, and the one that was likely meant.
func (l *Loader[T]) unknown(key, source string) *Problem {
	p := &Problem{Key: key, What: "unknown key", Source: source}
	best := 3 // further off is no help
	for _, f := range l.fields {
		if d := distance(key, f.key, best); d < best {
			best = d
			p.What = fmt.Sprintf("unknown key, did you mean %s?", f.key)
		}
	}
	return p
}

// distance is the edit distance of a and b, or limit if it is not smaller.
func distance(a, b string, limit int) int {
	if d := len(a) - len(b); d >= limit || -d >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return min(row[len(b)], limit)
}
