// Package rpc builds every gRPC server and client of the product, so that identity, authorization,
// deadlines, validation, errors and telemetry are the same everywhere: in one process (`landfall up`,
// in-memory connections) and in a fleet (TCP with mutual TLS).
//
// # A server
//
//	srv, err := rpc.NewServer(rpc.ServerOptions{Name: "change-tracker", Identity: id, Logger: log})
//	changetrackerv1.RegisterChangeTrackerServiceServer(srv, handlers)
//	lis, err := network.Listen(ctx, "mem:change-tracker") // or "127.0.0.1:7001"
//	err = srv.Run(ctx, lis)                               // serves until ctx ends, then drains
//
// Every call passes the layers of [LayerNames] in that order. Who may call a method is declared in the
// contract (option landfall.types.v1.callers) and read from the descriptors; a method without the
// declaration is refused to everybody. Handlers return domain errors wrapped by libs/errcat and read
// the caller with [PeerFrom].
//
// # A client
//
//	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: id, Network: network})
//	conn, err := dialer.Conn("mem:change-tracker", rpc.ExpectService("change-tracker"))
//	client := changetrackerv1.NewChangeTrackerServiceClient(conn)
//
// Errors of calls are *errcat.Error again, with the server's reason. Unary calls without a deadline get
// one; streams do not, their callers own their lifetime. Unary methods that the contract marks
// NO_SIDE_EFFECTS are retried while the server is unavailable; nothing else is retried here.
// [Hosts] finds the services of a host.
//
// # Bulk bytes
//
// [SendBulk] and [RecvBulk] move the last bytes field of a message through gRPC without copying it;
// on the wire the message is the ordinary proto, so any gRPC client can read it.
package rpc
