// Package errcat is the catalogue of every error an operator can see, and the form those errors take
// in Go and on the wire.
//
// An [Error] carries a reason of the contract (landfall.types.v1.ErrorReason), a sentence about what
// happened here, and a few named values. What the reason means in general (gRPC code, likely cause,
// what to do, whether trying again can help) stands once, in the catalogue ([Lookup]); docs/errors.md
// is generated from it.
//
// # How it is used
//
// Domain packages return plain sentinels. A service wraps them at its border:
//
//	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, err, "read point %d", ordinal)
//
// libs/rpc sends the error as google.rpc.Status ([ToStatus]) and gives the caller an *Error again
// ([FromError]), so errors.Is and [Is] answer the same on both sides of a connection, over any number
// of hops.
//
// # On the wire
//
// The status has the code of the catalogue and these details: ErrorInfo with the reason without its
// ERROR_REASON_ prefix, domain "landfall" and the metadata; LocalizedMessage (locale "en") with the
// likely cause and the action as two lines, so that a client older than the reason can still print
// them; RetryInfo where trying again can help; BadRequest with the fields that protovalidate found;
// PreconditionFailure for INVALID_STATE.
package errcat
