package errcat

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Error is an error with a reason of the catalogue. It is immutable once it was returned.
type Error struct {
	// Reason is the stable code; ERROR_REASON_UNSPECIFIED only for statuses of foreign gRPC servers.
	Reason typesv1.ErrorReason
	// What says what happened here, in one clause, without a full stop. It may be shown to anybody
	// who may call the method: no secrets.
	What string
	// Meta holds values that a program may want ("vm", "point", "state"). Keys are lower_snake_case.
	Meta map[string]string
	// RetryAfter is how long to wait before trying again; zero means the catalogue's value.
	RetryAfter time.Duration
	// Fields are the fields of the request that broke a rule, for INVALID_ARGUMENT.
	Fields []Field

	cause error
	// silent is set where What holds the cause's text already.
	silent bool
	// code and advice are set on errors decoded from a status whose reason this program does not know.
	code   codes.Code
	advice string
	// foreign is the reason as it stood on the wire when this program does not know it.
	foreign string
}

// Field is one broken rule of a request.
type Field struct {
	// Path is the field's path, for example "disks[2].size_bytes".
	Path string
	// Rule is the rule's id, for example "string.min_len"; it may be empty.
	Rule string
	// Message says what is wrong.
	Message string
}

// New returns an error of the given reason. The format and its arguments make What.
func New(reason typesv1.ErrorReason, format string, args ...any) *Error {
	return &Error{Reason: reason, What: sprintf(format, args)}
}

// Wrap returns an error of the given reason caused by err, which errors.Is and errors.As still find.
// What is "operation: text of err". Wrap of nil returns nil as an untyped error.
//
// A cancellation keeps its meaning: context.Canceled wraps as CANCELLED whatever the reason asked for,
// because nothing went wrong. A deadline takes the reason given: it is often an inner one, set by the
// operation that gives the reason.
func Wrap(reason typesv1.ErrorReason, err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		reason = typesv1.ErrorReason_ERROR_REASON_CANCELLED
	}
	e := &Error{Reason: reason, What: sprintf(format, args), cause: err}
	var inner *Error
	if errors.As(err, &inner) {
		e.Meta, e.Fields = maps.Clone(inner.Meta), slices.Clone(inner.Fields)
	}
	return e
}

// With returns a copy of the error with one more value in Meta.
func (e *Error) With(key, value string) *Error {
	c := *e
	c.Meta = maps.Clone(e.Meta)
	if c.Meta == nil {
		c.Meta = make(map[string]string, 1)
	}
	c.Meta[key] = value
	return &c
}

// After returns a copy of the error that asks to wait at least d before trying again.
func (e *Error) After(d time.Duration) *Error {
	c := *e
	c.RetryAfter = d
	return &c
}

// Error returns what happened, then the cause.
func (e *Error) Error() string {
	switch {
	case e.cause == nil, e.silent:
		return e.What
	case e.What == "":
		return e.cause.Error()
	default:
		return e.What + ": " + e.cause.Error()
	}
}

// Unwrap returns the cause, or nil.
func (e *Error) Unwrap() error { return e.cause }

// Is reports whether target is an *Error of the same reason; two errors without a reason are never
// the same.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Reason != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED && t.Reason == e.Reason
}

// Code is the gRPC code the error travels under.
func (e *Error) Code() codes.Code {
	if entry, ok := Lookup(e.Reason); ok {
		return entry.Code
	}
	if e.code != codes.OK {
		return e.code
	}
	return codes.Unknown
}

// Recoverable reports whether the same call may succeed later without anybody changing anything.
func (e *Error) Recoverable() bool {
	if entry, ok := Lookup(e.Reason); ok {
		return entry.Recoverable
	}
	return e.code == codes.Unavailable || e.code == codes.ResourceExhausted || e.code == codes.Aborted
}

// Is reports whether the outermost reason in err's chain is the given one.
func Is(err error, reason typesv1.ErrorReason) bool { return err != nil && Reason(err) == reason }

// Reason returns the outermost reason in err's chain. Context errors are CANCELLED and
// DEADLINE_EXCEEDED; nil and errors without a reason are ERROR_REASON_UNSPECIFIED.
func Reason(err error) typesv1.ErrorReason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	if r, ok := contextReason(err); ok {
		return r
	}
	return typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED
}

// Recoverable reports whether trying again later can help, for any error: by its reason where it has
// one; a context error is not recoverable by itself (re-read before you redo).
func Recoverable(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Recoverable()
}

// Code returns the reason as operators see it, without the ERROR_REASON_ prefix: "VM_NOT_FOUND".
func Code(reason typesv1.ErrorReason) string {
	return strings.TrimPrefix(reason.String(), reasonPrefix)
}

// Parse is the inverse of [Code]. It also takes the full enum name.
func Parse(code string) (typesv1.ErrorReason, bool) {
	v, ok := typesv1.ErrorReason_value[reasonPrefix+strings.TrimPrefix(code, reasonPrefix)]
	return typesv1.ErrorReason(v), ok
}

// Explain is what the CLI prints: what happened, the reason code, the likely cause, what to do; one
// to a line, each line with its label, no newline at the end.
func Explain(err error) string {
	if err == nil {
		return ""
	}
	e := of(err)
	var b strings.Builder
	fmt.Fprintf(&b, "what happened: %s\n", err)
	for _, f := range e.Fields {
		if !strings.Contains(err.Error(), f.Message) { // the sentence may be made of them
			fmt.Fprintf(&b, "               %s: %s\n", f.Path, f.Message)
		}
	}
	cause, action := e.advise()
	fmt.Fprintf(&b, "reason:        %s\n", e.label())
	fmt.Fprintf(&b, "likely cause:  %s\n", cause)
	fmt.Fprintf(&b, "what to do:    %s", action)
	return b.String()
}

// label is the reason as printed, also for reasons that this program does not know.
func (e *Error) label() string {
	if e.foreign != "" {
		return e.foreign
	}
	if e.Reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		return e.Code().String()
	}
	return Code(e.Reason)
}

// advise returns the likely cause and the action.
func (e *Error) advise() (cause, action string) {
	if entry, ok := Lookup(e.Reason); ok {
		return entry.Cause, entry.Action
	}
	if cause, action, ok := strings.Cut(e.advice, "\n"); ok {
		return cause, action
	}
	internal := catalogue[typesv1.ErrorReason_ERROR_REASON_INTERNAL]
	return internal.Cause, internal.Action
}

// of returns the *Error that stands for err: the one in its chain, else one made from a gRPC status,
// a context error, or INTERNAL.
func of(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	if r, ok := contextReason(err); ok {
		return &Error{Reason: r, cause: err}
	}
	if errors.As(FromError(err), &e) && e.code != codes.Unknown {
		return e
	}
	return &Error{Reason: typesv1.ErrorReason_ERROR_REASON_INTERNAL, cause: err}
}

func contextReason(err error) (typesv1.ErrorReason, bool) {
	switch {
	case errors.Is(err, context.Canceled):
		return typesv1.ErrorReason_ERROR_REASON_CANCELLED, true
	case errors.Is(err, context.DeadlineExceeded):
		return typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED, true
	}
	return typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, false
}

func sprintf(format string, args []any) string {
	if len(args) == 0 {
		return format
	}
	return fmt.Sprintf(format, args...)
}
