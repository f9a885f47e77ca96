"""Streams an answer over gRPC: raymoe serve DIR grpc_port=9000, then python examples/grpc/client.py --model NAME "def double(x):"

--list asks the server's reflection what it offers; nothing of raymoe is needed for that.
"""

import argparse
import os

import grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from raymoe.serving import generation_pb2 as pb
from raymoe.serving.generation_pb2_grpc import GenerationStub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="def double(x):")
    parser.add_argument("--address", default="127.0.0.1:9000")
    parser.add_argument("--model", default="", help="default: the first one that the server has")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--list", action="store_true", help="say which services there are")
    asked = parser.parse_args()
    # the key, if the server asks for one, stands in no command line
    key = os.environ.get("RAYMOE_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    with grpc.insecure_channel(asked.address) as channel:
        if asked.list:
            print(*ProtoReflectionDescriptorDatabase(channel).get_services(), sep="\n")
            return
        server = GenerationStub(channel)
        try:
            model = asked.model or server.Models(pb.ModelsRequest(), metadata=metadata).models[0]
            sampling = pb.Sampling(max_tokens=asked.max_tokens, temperature=asked.temperature)
            request = pb.CompleteRequest(model=model, text=asked.prompt, sampling=sampling)
            for chunk in server.StreamComplete(request, metadata=metadata):
                print(chunk.choice.text, end="", flush=True)
            print(f"\n[{chunk.usage.completion_tokens} tokens]")
        except grpc.RpcError as error:
            raise SystemExit(f"{error.code().name}: {error.details()}") from None


if __name__ == "__main__":
    main()
