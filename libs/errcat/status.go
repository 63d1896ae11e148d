package errcat

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Domain is ErrorInfo.domain of every error of this product.
const Domain = "landfall"

const (
	reasonPrefix = "ERROR_REASON_"
	locale       = "en"
	// maxMessage bounds the text of a status, in bytes: it travels in HTTP/2 trailers, whose list
	// gRPC peers limit to 16 KiB by default.
	maxMessage = 2 << 10
	// maxFields bounds the field violations of a status, for the same reason.
	maxFields = 20
	// maxMeta bounds the number of values in the metadata, maxValue the bytes of each.
	maxMeta  = 24
	maxValue = 256
)

// GRPCStatus lets google.golang.org/grpc/status see an *Error as the status that [ToStatus] makes.
func (e *Error) GRPCStatus() *status.Status { return ToStatus(e) }

// ToStatus makes the status that travels. Nil is OK. An error without a reason in its chain is taken
// for what it is: a context error, a violation of protovalidate, a gRPC status that is passed on
// (unless it is Unknown), else INTERNAL.
func ToStatus(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	e, text := classify(err), err.Error()
	st := status.New(e.Code(), clip(text, maxMessage))
	var details []protoadapt.MessageV1
	if name := e.wireReason(); name != "" {
		cause, action := e.advise()
		details = append(details,
			&errdetails.ErrorInfo{Reason: name, Domain: Domain, Metadata: boundMeta(e.Meta)},
			&errdetails.LocalizedMessage{Locale: locale, Message: cause + "\n" + action})
	}
	if wait := e.retryAfter(); wait > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(wait)})
	}
	if len(e.Fields) > 0 {
		bad := &errdetails.BadRequest{}
		for _, f := range e.Fields[:min(len(e.Fields), maxFields)] {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field: f.Path, Description: clip(f.Message, maxMessage/8), Reason: f.Rule,
			})
		}
		details = append(details, bad)
	}
	if e.Reason == typesv1.ErrorReason_ERROR_REASON_INVALID_STATE {
		details = append(details, &errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{{
			Type: "STATE", Subject: e.Meta["resource"], Description: clip(e.Error(), maxMessage/8),
		}}})
	}
	if with, err := st.WithDetails(details...); err == nil {
		return with
	}
	return st
}

// FromStatus is the inverse of [ToStatus]; OK is nil. Statuses without our ErrorInfo get the reason
// nearest to their code, so that a refused connection is UNAVAILABLE here too.
func FromStatus(st *status.Status) error {
	if st == nil || st.Code() == codes.OK {
		return nil
	}
	e := &Error{What: unretried(st.Message()), code: st.Code()}
	known := false
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != Domain {
				continue
			}
			e.Meta = maps.Clone(d.GetMetadata())
			known = true
			if r, ok := Parse(d.GetReason()); ok {
				e.Reason = r
			} else {
				e.foreign = d.GetReason()
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		case *errdetails.LocalizedMessage:
			e.advice = d.GetMessage()
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				e.Fields = append(e.Fields, Field{Path: v.GetField(), Rule: v.GetReason(), Message: v.GetDescription()})
			}
		}
	}
	if !known {
		e.Reason = reasonOf(st.Code())
	}
	switch st.Code() {
	case codes.Canceled:
		e.cause, e.silent = context.Canceled, true
	case codes.DeadlineExceeded:
		e.cause, e.silent = context.DeadlineExceeded, true
	}
	return e
}

// unretried takes away what grpc-go puts before the message of a call that it tried several times.
func unretried(message string) string {
	if strings.HasPrefix(message, "max retries exhausted: ") {
		if _, own, ok := strings.Cut(message, " desc = "); ok {
			return own
		}
	}
	return message
}

// FromError turns what a gRPC call returned into an *Error. Nil stays nil; an error that has a reason
// already, and one that is no status, is returned as it is.
func FromError(err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	if st, ok := status.FromError(err); ok {
		return FromStatus(st)
	}
	return err
}

// classify finds or makes the *Error whose reason and details travel for err.
func classify(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var bad *protovalidate.ValidationError
	if errors.As(err, &bad) {
		return &Error{Reason: typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, Fields: fieldsOf(bad)}
	}
	return of(err)
}

// Invalid makes an INVALID_ARGUMENT error with its fields from what protovalidate's Validate
// returned. Errors that are no violations (a rule that does not compile) are INTERNAL. Nil is nil.
func Invalid(err error) error {
	if err == nil {
		return nil
	}
	var bad *protovalidate.ValidationError
	if !errors.As(err, &bad) {
		return Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "validate the request")
	}
	e := New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "the request is not valid")
	e.Fields = fieldsOf(bad)
	if len(e.Fields) > 0 {
		e.What = e.Fields[0].Path + ": " + e.Fields[0].Message
	}
	return e
}

func fieldsOf(bad *protovalidate.ValidationError) []Field {
	fields := make([]Field, 0, len(bad.Violations))
	for _, v := range bad.Violations {
		fields = append(fields, Field{
			Path:    protovalidate.FieldPathString(v.Proto.GetField()),
			Rule:    v.Proto.GetRuleId(),
			Message: v.Proto.GetMessage(),
		})
	}
	return fields
}

// wireReason is ErrorInfo.reason, or "" where the status has none.
func (e *Error) wireReason() string {
	if e.foreign != "" {
		return e.foreign
	}
	if e.Reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		return ""
	}
	return Code(e.Reason)
}

// boundMeta keeps the metadata of a status small: the first keys in order, their values clipped.
func boundMeta(meta map[string]string) map[string]string {
	if len(meta) == 0 {
		return nil
	}
	keys := slices.Sorted(maps.Keys(meta))
	out := make(map[string]string, min(len(keys), maxMeta))
	for _, k := range keys[:min(len(keys), maxMeta)] {
		out[k] = clip(meta[k], maxValue)
	}
	return out
}

func (e *Error) retryAfter() time.Duration {
	if e.RetryAfter > 0 {
		return e.RetryAfter
	}
	entry, _ := Lookup(e.Reason)
	return entry.RetryAfter
}

// reasonOf is the reason that stands for a bare gRPC code.
func reasonOf(code codes.Code) typesv1.ErrorReason {
	switch code {
	case codes.Canceled:
		return typesv1.ErrorReason_ERROR_REASON_CANCELLED
	case codes.DeadlineExceeded:
		return typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED
	case codes.InvalidArgument, codes.OutOfRange:
		return typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
	case codes.Unauthenticated:
		return typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED
	case codes.PermissionDenied:
		return typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED
	case codes.Unavailable, codes.ResourceExhausted:
		return typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	case codes.Unimplemented:
		return typesv1.ErrorReason_ERROR_REASON_UNIMPLEMENTED
	case codes.Aborted:
		return typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION
	case codes.FailedPrecondition:
		return typesv1.ErrorReason_ERROR_REASON_INVALID_STATE
	case codes.Internal, codes.DataLoss:
		return typesv1.ErrorReason_ERROR_REASON_INTERNAL
	}
	return typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED
}

// clip cuts s to at most n bytes at a rune boundary.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const mark = "…"
	n -= len(mark)
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n] + mark
}
